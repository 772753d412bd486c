"""One object per training method: which columns it reads and what it minimises. The trainer is the same for all."""

from cocomix.objectives.base import Counts, Losses, Objective
from cocomix.objectives.cocomix import ConceptMixing
from cocomix.objectives.ntp import NextToken

__all__ = ["ConceptMixing", "Counts", "Losses", "NextToken", "Objective"]
