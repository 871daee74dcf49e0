"""Responses without a thought are reported once, and only where rewards need one."""

from nemo_disco.rollout.response_warnings import ResponseWarnings


def test_the_warning_is_given_once_and_only_where_it_holds():
    warnings = ResponseWarnings(require_think=True)
    assert warnings.new_warnings(["a</think>b", "c"]) == warnings.new_warnings([]) == []
    (thinking,) = warnings.new_warnings(["a", "b"])
    assert "no response has </think>" in thinking and "reward.require_think=false" in thinking
    assert warnings.new_warnings(["a"]) == []


def test_missing_thinking_is_reported_only_where_rewards_need_it():
    assert ResponseWarnings(require_think=False).new_warnings(["a"]) == []
