"""pandas as this package uses it: without its types.

The annotations that pandas carries return unions for almost every call ("DataFrame | Series | Scalar | …"), so that a
type checker finds hundreds of errors that are none. Frames and series are `Any` here; what they hold is tested.
"""

from typing import Any

import pandas

pd: Any = pandas
Frame = Any
"""A `pandas.DataFrame`."""
Series = Any
"""A `pandas.Series`."""
