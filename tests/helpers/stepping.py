"""A run's iterations one at a time, without its directory; and what it samples, seen or changed."""

from dataclasses import replace

from dcjax.loop.evaluate import evaluate_state
from dcjax.loop.rollouts import InProcess
from dcjax.loop.setup import begin, check, set_up
from dcjax.loop.train import Stopwatch, make_sampler
from dcjax.loop.updater import Updater
from dcjax.sharding.hosts import Preemption


class Stepper:
    """What `dcjax train` steps with; other problems than the config's, where they are given."""

    def __init__(self, config, rewards, problems=None):
        checked = check(config)
        self.config, self.setup = config, set_up(replace(checked, problems=problems or checked.problems), rewards)
        self.mesh = self.setup.mesh
        self.sampler = make_sampler(self.setup, Preemption(), InProcess(self.setup))
        self.updater = Updater(self.setup)

    def begin(self):
        return begin(self.setup)

    def iterate(self, state, cursor):
        stopwatch = Stopwatch(self.setup)
        sampled, following = self.sampler(state, cursor)
        stopwatch.sampled()
        stopwatch.update_begins()
        state, metrics = self.updater(state, sampled)
        return state, following, metrics | stopwatch.updated(sampled), sampled

    def evaluate(self, state):
        self.sampler.settle()
        return evaluate_state(self.setup, state)


def change_rollouts(patch, module, change):
    """Until the patch is undone, what a module samples is what `change` makes of (engine, rollout)."""

    class Changed(module.Sampling):
        def __init__(self, engine, *arguments, **settings):
            super().__init__(engine, *arguments, **settings)
            self._engine_of_tests = engine

        def rollout(self):
            return change(self._engine_of_tests, super().rollout())

    patch.setattr(module, "Sampling", Changed)
