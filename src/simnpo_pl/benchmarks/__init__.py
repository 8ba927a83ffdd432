"""Benchmarks: what is forgotten, what is kept, what is measured."""

from simnpo_pl.benchmarks.demo import DemoData
from simnpo_pl.benchmarks.markov import MarkovData
from simnpo_pl.benchmarks.muse import MuseData
from simnpo_pl.benchmarks.own import OwnData
from simnpo_pl.benchmarks.tofu import TofuData
from simnpo_pl.benchmarks.wmdp import WmdpData

__all__ = ["DemoData", "MarkovData", "MuseData", "OwnData", "TofuData", "WmdpData"]
