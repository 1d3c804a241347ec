from stageparity.plugin import test_every_stage_is_judged_once, test_stage  # noqa: F401
