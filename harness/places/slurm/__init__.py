"""Jobs on a Slurm cluster. Nothing else in the harness knows Slurm's commands.

submit     jobs to arrays: skip what is queued, freeze the tables, `sbatch`
queue      the arrays of a sweep, and what of them is queued or running
script     the text of a job script
client     Slurm's commands with timeouts, and their errors in one line
environment  what of the environment of a launch reaches them, and the jobs
explain    why a run does not train: what became of its job
task       what a job script calls on its node before and after training (`python -m harness.places.slurm`)

`<sweep>/_slurm/<array>/` holds `job.sh`, `runs.json` (the run_ids of each element), `configs.jsonl` (their frozen
configurations), `submitted.json` and `log/`. The array's name is the name of its job in Slurm, so that
its queued and running elements can be recognised.
"""
