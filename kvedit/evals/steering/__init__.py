"""Steering, compared: strength at equal KL, baselines, style, correctness, sweeps."""

from kvedit.evals.steering.answers import extract_choice, extract_number, is_right
from kvedit.evals.steering.arithmetic import choice_problems, word_problems
from kvedit.evals.steering.asker import Asker
from kvedit.evals.steering.bystanders import Bystanders, Moved
from kvedit.evals.steering.calibrating import (
    CalibratedStrength,
    StrengthKL,
    calibrate_strength,
)
from kvedit.evals.steering.directions import random_like
from kvedit.evals.steering.entering import Steering
from kvedit.evals.steering.files import read_arc, read_gsm8k
from kvedit.evals.steering.gym import gym_choices, gym_problems
from kvedit.evals.steering.markers import STEP_BY_STEP, Markers
from kvedit.evals.steering.methods import Baselines, Method
from kvedit.evals.steering.repeating import distinct, longest_repeat
from kvedit.evals.steering.report import StyleReport
from kvedit.evals.steering.scores import METRICS
from kvedit.evals.steering.styling import evaluate_style
from kvedit.evals.steering.sweeping import Sweep, sweep
from kvedit.evals.steering.talking import with_examples, with_instruction
from kvedit.evals.steering.unrelated import unrelated_prompts

__all__ = [
    "METRICS",
    "STEP_BY_STEP",
    "Asker",
    "Baselines",
    "Bystanders",
    "CalibratedStrength",
    "Markers",
    "Method",
    "Moved",
    "Steering",
    "StrengthKL",
    "StyleReport",
    "Sweep",
    "calibrate_strength",
    "choice_problems",
    "distinct",
    "evaluate_style",
    "extract_choice",
    "extract_number",
    "gym_choices",
    "gym_problems",
    "is_right",
    "longest_repeat",
    "random_like",
    "read_arc",
    "read_gsm8k",
    "sweep",
    "unrelated_prompts",
    "with_examples",
    "with_instruction",
    "word_problems",
]
