"""Where a process learns which rank it is, and where the ranks meet."""

import pytest

from harness.errors import UserError
from harness.process.rank import ranks_from_environment
from harness.process.slurm_task import slurm_task

STEP = {
    "SLURM_JOB_ID": "7",
    "SLURM_STEP_ID": "0",
    "SLURM_STEP_NODELIST": "gpu[012-014,020]",
    "SLURM_PROCID": "2",
    "SLURM_STEP_NUM_TASKS": "8",
    "SLURM_LOCALID": "2",
}


def test_ranks_come_from_torchrun_or_srun_or_are_one() -> None:
    assert ranks_from_environment({}).world == 1
    torchrun = ranks_from_environment({"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1"})
    assert (torchrun.rank, torchrun.world, torchrun.local_rank) == (3, 4, 1)
    srun = ranks_from_environment(STEP)
    assert (srun.rank, srun.world, srun.local_rank) == (2, 8, 2)
    batch_script = {"SLURM_JOB_ID": "7", "SLURM_PROCID": "0", "SLURM_NTASKS": "8"}
    assert ranks_from_environment(batch_script).world == 1


def test_a_rank_that_was_left_behind_does_not_count_in_a_step_of_several_tasks() -> None:
    left_behind = {"RANK": "0", "WORLD_SIZE": "4", "LOCAL_RANK": "0", "MASTER_ADDR": "h", "MASTER_PORT": "1"}
    assert (ranks_from_environment(STEP | left_behind).rank, ranks_from_environment(STEP | left_behind).world) == (2, 8)
    torchrun = ranks_from_environment(STEP | left_behind | {"TORCHELASTIC_RUN_ID": "x"})
    assert (torchrun.rank, torchrun.world) == (0, 4)
    one_task = STEP | {"SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"}
    assert ranks_from_environment(one_task | left_behind).world == 4  # our launcher's ranks in a step of one task


@pytest.mark.parametrize(
    "damaged",
    [
        {"RANK": "a", "WORLD_SIZE": "2"},
        {"RANK": "-1", "WORLD_SIZE": "2"},
        {"RANK": "2", "WORLD_SIZE": "2"},
        {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "x"},
        STEP | {"SLURM_PROCID": "x"},
        STEP | {"SLURM_STEP_NUM_TASKS": "2(x4)"},
        STEP | {"SLURM_JOB_ID": "seven"},
        STEP | {"SLURM_STEP_ID": "batch"},
    ],
)
def test_variables_that_are_no_numbers_are_a_wrong_request(damaged: dict[str, str]) -> None:
    with pytest.raises(UserError):
        ranks_from_environment(damaged)


def test_the_shell_of_a_step_with_a_terminal_is_one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    shell = STEP | {"SLURM_PTY_PORT": "44187", "SLURM_PROCID": "0"}
    monkeypatch.setattr("harness.process.slurm_task._in_shell_of_terminal", lambda: True)
    assert (ranks_from_environment(shell).world, slurm_task(shell).step_tasks) == (1, 1)  # pyright: ignore
    assert ranks_from_environment(STEP).world == 8
    # a step that is started from that shell inherits the variable; its tasks have no terminal
    monkeypatch.setattr("harness.process.slurm_task._in_shell_of_terminal", lambda: False)
    assert ranks_from_environment(shell).world == 8


def test_the_ranks_of_an_srun_step_find_each_other() -> None:
    def meeting_point(environment: dict[str, str]) -> tuple[str, int] | None:
        return ranks_from_environment(environment).meeting_point

    on_one_node, on_four, on_two = (
        meeting_point(STEP | changes)
        for changes in (
            {},
            {"SLURM_STEP_NUM_NODES": "4"},
            {"SLURM_STEP_NUM_NODES": "2", "SLURM_STEP_NODELIST": "a1,b2"},
        )
    )
    assert on_one_node is not None and on_one_node[0] == "127.0.0.1"
    assert on_four is not None and on_four[0] == "gpu012" and 20_000 <= on_four[1] < 40_000
    assert on_two is not None and on_two[0] == "a1"
    assert meeting_point(STEP | {"MASTER_ADDR": "given"}) is None
    assert meeting_point({"SLURM_JOB_ID": "7"}) is None


def test_a_job_is_named_as_slurm_names_it() -> None:
    assert slurm_task({}) is None
    alone = slurm_task({"SLURM_JOB_ID": "123"})
    assert alone is not None and (alone.name, alone.step_tasks) == ("123", 1)
    element = slurm_task({"SLURM_JOB_ID": "124", "SLURM_ARRAY_JOB_ID": "120", "SLURM_ARRAY_TASK_ID": "4"})
    assert element is not None and element.name == "120_4"
