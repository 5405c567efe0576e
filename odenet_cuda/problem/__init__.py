"""What the user gave, made regular once: the state and its leaves, func over them, times and tolerances."""

from .field import Field, WithArguments, aliased, counter_of, own_tensors, parameters_of, parted, with_arguments
from .initial_value import Problem, to_device
from .numbers import check_times, check_tolerance, check_zero_tolerance
from .structure import Structure, check_samples, check_state
from .times import OwnTimes, times_as_tensor

__all__ = [
    "Field",
    "OwnTimes",
    "Problem",
    "Structure",
    "WithArguments",
    "aliased",
    "check_samples",
    "check_state",
    "check_times",
    "check_tolerance",
    "check_zero_tolerance",
    "counter_of",
    "own_tensors",
    "parameters_of",
    "parted",
    "times_as_tensor",
    "to_device",
    "with_arguments",
]
