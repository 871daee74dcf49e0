"""Each warning about a step from which nothing is learned is given once."""

from nemo_disco.rollout.response_warnings import ResponseWarnings


def test_each_warning_is_given_once_and_only_where_it_holds():
    warnings = ResponseWarnings(require_think=True)
    assert warnings.new_warnings(["a</think>b", "c"], mixed=0.5) == []
    (thinking,) = warnings.new_warnings(["a", "b"], mixed=0.5)
    assert "no response has </think>" in thinking and "reward.require_think=false" in thinking
    (mixed,) = warnings.new_warnings(["a", "b"], mixed=0.0)
    assert "both right and wrong" in mixed
    assert warnings.new_warnings(["a"], mixed=0.0) == []


def test_missing_thinking_is_reported_only_where_rewards_need_it():
    assert ResponseWarnings(require_think=False).new_warnings(["a"], mixed=1.0) == []
