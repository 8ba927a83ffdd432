"""Names of metrics in the logger, in groups: forget, retain, utility, privacy."""

GROUPS = {
    "forget_quality": "forget/quality",
    "model_utility": "utility/model_utility",
    "real_authors/": "utility/real_authors_",
    "world_facts/": "utility/world_facts_",
    "mia_": "privacy/mia_",
    "privleak": "privacy/privleak",
}
"""Beginning of a metric's name to what stands for it in the logger; every other name is its own."""


def tag(name: str) -> str:
    """Name of a metric in the logger, in one of the groups forget, retain, utility and privacy.

    Example:
        >>> tag("forget_quality/log10_p"), tag("real_authors/rouge"), tag("retain/rouge")
        ('forget/quality_log10_p', 'utility/real_authors_rouge', 'retain/rouge')
    """
    for start, group in GROUPS.items():
        if name.startswith(start):
            return group + name.removeprefix(start).replace("/", "_")
    return name
