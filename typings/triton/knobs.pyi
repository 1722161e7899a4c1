class runtime_knobs:
    interpret: bool

runtime: runtime_knobs
