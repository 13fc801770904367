"""When more slots are expected."""

from worlds import NOW, a_pod, an_agent, pending

from trunkline_operator.decisions.runway import Coming, runway, start_seconds


def test_a_pod_is_expected_as_long_after_its_creation_as_others_took() -> None:
    agent = an_agent(warm={"slotsPerPod": 8, "startupSecondsHint": 90})
    ready = [a_pod(agent, n, start_seconds=took) for n, took in enumerate((20.0, 30.0, 400.0))]
    starting = pending(agent, 3, created=NOW - 10)
    assert start_seconds(agent, []) == 90
    assert runway(agent, [*ready, starting], 1, NOW, 8) == (
        Coming(8, NOW + 20),
        Coming(8, NOW + 30),
    )
    assert runway(agent, [starting], 0, NOW, 8) == (Coming(8, NOW + 80),)


def test_nobody_waits_for_a_pod_that_cannot_come() -> None:
    agent = an_agent()
    pods = [
        a_pod(agent, 0),
        pending(agent, 1, unschedulable="no node has a GPU free"),
        pending(agent, 2, trouble="ImagePullBackOff"),
        pending(agent, 3, terminating=True),
        pending(agent, 4, draining_since=NOW),
    ]
    assert runway(agent, pods, 0, NOW, 4) == ()
