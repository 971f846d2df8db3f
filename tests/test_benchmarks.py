"""What the benchmarks promise holds on the machine that runs the tests."""

import controls


def test_every_control_answers_at_once(capsys):
    """100 ms at the median, 150 ms for what reads 2,048 tokens, and 250 ms at the 95th percentile.

    A machine that is busy with other things slows one run; a slow app is slow in each of three.
    """
    slow = slow_apps()
    for _ in range(2):
        if slow:
            slow &= slow_apps()
    assert not slow, capsys.readouterr().out


def slow_apps() -> set[str]:
    paces = controls.main()
    assert len(paces) == 9 and all(len(pace.seconds) >= 5 for pace in paces)
    return {pace.app for pace in paces if pace.slow}
