"""Studies (one YAML file each) and `python -m sweeps`, which runs one and writes its report."""
