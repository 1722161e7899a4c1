class runtime_knobs:
    interpret: bool

runtime: runtime_knobs

class _Tool:
    path: str

class _Nvidia:
    cuobjdump: _Tool

nvidia: _Nvidia
