"""Faults of gradients that are projected before they are stored or sent, for scripts/mutants.py."""

from __future__ import annotations

from faults_of_arithmetic import Mutant

TRAJECTORY = "threads/test_thread_projected.py -k trajectory"

PROJECTION = [
    Mutant(
        "engine/sums.py",
        "dtype, purpose).div_(size)",
        "dtype, purpose)",
        "projected gradients of the ranks are added up and not averaged",
        TRAJECTORY,
    ),
    Mutant(
        "engine/sums.py",
        "        self.factor = factor if self.factor is None else self.factor * factor",
        "        pass",
        "a clip leaves projected gradients as they are",
        TRAJECTORY,
    ),
    Mutant(
        "engine/sums.py",
        'self._seed, f"{plan.name}\\0{what}\\0{self._pass}"',
        'self._seed, f"{plan.name}"',
        "narrow sums of one step are all rounded by the same bits",
        "unit/test_sums.py",
    ),
    Mutant(
        "engine/projected.py",
        "                self._waiting.pop(plan.name, None)\n",
        "",
        "every micro-batch of a step gives a matrix that is due another basis",
        TRAJECTORY,
    ),
    Mutant(
        "engine/projected.py",
        "        self._unsent = not syncs and not self._alone\n",
        "        self._unsent = False\n",
        "what backward passes that do not sync have left is not sent",
        "threads/test_thread_projected.py -k never",
    ),
    Mutant(
        "engine/projected.py",
        "        self._new.clear()\n        self._beside.clear()\n",
        "        self._beside.clear()\n",
        "a basis of gradients that were dropped is taken over all the same",
        "threads/test_thread_projected.py -k dropped_gradients",
    ),
    Mutant(
        "engine/clipping.py",
        "now[name]._version != version",
        "False",
        "a clip of what is not projected alone goes unnoticed",
        "threads/test_thread_projected.py -k clip_that_does_not_know",
    ),
]
