"""One class per training method: the dataset columns it reads and the loss it minimizes. All share one trainer."""

from cocomix.objectives.base import Counts, Losses, Objective
from cocomix.objectives.cocomix import ConceptMixing
from cocomix.objectives.distillation import Distillation
from cocomix.objectives.gate import TeacherGate
from cocomix.objectives.hidden_states import HiddenStateMixing
from cocomix.objectives.multi_token import MultiToken
from cocomix.objectives.ntp import NextToken
from cocomix.objectives.schedule import WeightSchedule

__all__ = [
    "ConceptMixing",
    "Counts",
    "Distillation",
    "HiddenStateMixing",
    "Losses",
    "MultiToken",
    "NextToken",
    "Objective",
    "TeacherGate",
    "WeightSchedule",
]
