"""The tasks of a run, in order."""

from clusters import tiny

from lpgan_jax.training.building import training_of
from lpgan_jax.training.tasks import tasks


def of(**fields):
    return training_of(tiny(**fields))


def kinds(*arguments):
    return [(task.kind, task.step) for task in tasks(*arguments)]


def test_the_tasks_of_a_run():
    training = of(steps=3, sample_every=2, checkpoint_every=3)
    assert kinds(training, 0, True) == [
        ("state", 0),
        ("answer", 0),
        ("train", 0),
        ("train", 1),
        ("answer", 2),
        ("train", 2),
        ("guard", 3),
        ("answer", 3),
        ("checkpoint", 3),
        ("finish", 3),
    ]


def test_a_run_goes_on_from_a_checkpoint():
    training = of(steps=3, sample_every=2, checkpoint_every=3)
    assert kinds(training, 2, True) == kinds(training, 0, True)[-5:]
    assert kinds(training, 3, True) == [("finish", 3)]


def test_what_is_not_opened_is_not_asked():
    training = of(steps=3, sample_every=2, checkpoint_every=3)
    assert kinds(training, 0, False) == [
        task for task in kinds(training, 0, True) if task[0] != "answer"
    ]


def test_the_guard_looks_every_so_often_and_before_each_save():
    def looks(**fields):
        return [step for kind, step in kinds(of(**fields), 0, False) if kind == "guard"]

    every = {"steps": 12, "checkpoint_every": 5}
    assert looks(**every, guard_every=3) == [3, 5, 6, 9, 10, 12]
    assert looks(**every, guard_every=100) == [5, 10, 12]
    assert looks(**every, guard_every=0) == []
