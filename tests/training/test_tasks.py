"""The tasks of a run, in order."""

from clusters import tiny

from lpgan_jax.training.tasks import tasks


def kinds(*arguments):
    return [(task.kind, task.step) for task in tasks(*arguments)]


def test_the_tasks_of_a_run():
    settings = tiny(steps=3, sample_every=2, checkpoint_every=3)
    assert kinds(settings, 0, True) == [
        ("state", 0),
        ("generate", 0),
        ("train", 0),
        ("train", 1),
        ("generate", 2),
        ("train", 2),
        ("generate", 3),
        ("checkpoint", 3),
        ("finish", 3),
    ]


def test_a_run_goes_on_from_a_checkpoint():
    settings = tiny(steps=3, sample_every=2, checkpoint_every=3)
    assert kinds(settings, 2, True) == kinds(settings, 0, True)[-4:]
    assert kinds(settings, 3, True) == [("finish", 3)]


def test_what_is_not_opened_is_not_generated():
    settings = tiny(steps=3, sample_every=2, checkpoint_every=3)
    assert kinds(settings, 0, False) == [
        task for task in kinds(settings, 0, True) if task[0] != "generate"
    ]
