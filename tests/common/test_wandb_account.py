"""The name of a W&B project is refused before a run begins, if and only if W&B would refuse it."""

from pathlib import Path

import pytest
import wandb
from pydantic import ValidationError

from grace_bench.analysis.dashboard import dashboard
from grace_bench.common.wandb_account import check_project
from grace_bench.errors import UserError
from grace_bench.launch.compose import compose
from grace_bench.launch.run_config import RunConfig
from helpers import each_value_once

REFUSED = ["a/b", "a\\b", "a#b", "a?b", "a%b", "a:b", "#", "p" * 129]
TAKEN = ["grace-bench", "p" * 128, "über 9000", "правки=1", "a.b_c (d) [e] {f} & 'g' @ $", "中文😀"]


@each_value_once("project, mode", REFUSED, ["auto", "offline", "disabled"])
def test_a_project_that_wandb_refuses_is_refused_when_it_is_asked_for(project: str, mode: str) -> None:
    with pytest.raises((wandb.UsageError, ValidationError)):
        wandb.Settings(project=project)
    with pytest.raises(UserError, match=r"^wandb\.project") as refused:
        compose([f"wandb.project='{project}'", f"wandb.mode={mode}"])
    told = str(refused.value)
    assert "\n" not in told
    if len(project) > 128:
        assert "has 129 characters; W&B takes at most 128" in told
    else:
        (wrong,) = set(project) & set("/\\#?%:")
        assert f" holds {wrong}; " in told


@pytest.mark.parametrize("project", ["", "' '"])
def test_a_project_without_a_name_is_refused(project: str) -> None:
    with pytest.raises(UserError, match=r"^wandb\.project="):
        compose([f"wandb.project={project}"])


@pytest.mark.parametrize("project", TAKEN)
def test_a_project_that_wandb_takes_is_taken(project: str) -> None:
    assert wandb.Settings(project=project).project == project
    check_project("wandb.project", project)
    assert compose([f"wandb.project={project}"]).wandb.project == project


def test_a_run_that_was_made_with_such_a_project_can_still_be_read() -> None:
    plain = compose([]).plain()
    plain["wandb"] = {**plain["wandb"], "project": "a/b"}
    assert RunConfig.from_plain(plain).wandb.project == "a/b"


def test_no_dashboard_is_made_for_a_project_that_cannot_be(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"^project=a/b holds /"):
        dashboard("a/b", entity=None, group=None, out=tmp_path / "out", say=print)
    assert not (tmp_path / "out").exists()
