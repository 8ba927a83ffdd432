"""The demo: TOFU's layout with fictional authors, and small models that are trained on them on first use."""

from pathlib import Path
from typing import Any

from simnpo_pl.benchmarks.tofu import TofuData


class DemoData(TofuData):
    """Fictional authors and the models that know them, made in `path` if they are missing.

    The start model is `path`/start, the retrained one `path`/retrained.

    Args:
        path: Folder for data and models.
        forget_split: forget10, the one split the demo has.
        data_seed: Seed of authors and models; null takes the run's. Runs of several seeds over one folder need it.
        kwargs: Passed on to `TofuData`.
    """

    def __init__(
        self,
        path: str = "runs/demo-data",
        forget_split: str = "forget10",
        data_seed: int | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(path=path, forget_split=forget_split, **kwargs)
        self.data_seed = data_seed

    def prepare_data(self) -> None:
        """Makes data and models once; other processes that share the folder wait."""
        from filelock import FileLock

        from simnpo_pl.benchmarks.demo.models import prepare

        folder = Path(self.path).expanduser()
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(folder / ".lock"):
            prepare(folder, self.seed if self.data_seed is None else self.data_seed)
