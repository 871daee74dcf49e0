"""A step from which nothing is learned is said, once."""

from nemo_disco.rollout.response_warnings import ResponseWarnings


def test_each_caution_is_given_once_and_only_where_it_holds():
    warnings = ResponseWarnings(require_think=True)
    assert warnings.about(["a</think>b", "c"], mixed=0.5) == []
    (thinking,) = warnings.about(["a", "b"], mixed=0.5)
    assert "no response has </think>" in thinking and "reward.require_think=false" in thinking
    (mixed,) = warnings.about(["a", "b"], mixed=0.0)
    assert "both right and wrong" in mixed
    assert warnings.about(["a"], mixed=0.0) == []


def test_thinking_is_asked_for_only_where_rewards_need_it():
    assert ResponseWarnings(require_think=False).about(["a"], mixed=1.0) == []
