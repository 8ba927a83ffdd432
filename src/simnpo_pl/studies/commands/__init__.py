"""Commands that were not merged with their study yet."""
