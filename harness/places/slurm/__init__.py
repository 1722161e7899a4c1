"""Jobs on a Slurm cluster. Nothing else in the harness knows Slurm's commands.

submit     jobs to arrays: what is queued already, tables frozen, `sbatch`
script     the text of a job script
client     Slurm's commands, with timeouts, and what they say when they refuse
task       what a job script calls on the compute node, before and after the training (`python -m harness.places.slurm`)

`<sweep>/_slurm/<array>/` holds `job.sh`, `runs.json` (the run_ids of each element), `configs.jsonl` (their frozen
configurations), `submitted.json` and `log/`. The array's name is the name of the job in Slurm, which is how an element
that waits or runs is recognised.
"""
