"""torchvision.models, the independent definition of the architectures.

torchvision's compiled operators (non-maximum suppression and the like) fail to load beside a build
of PyTorch for the CPU alone, and with them the whole import; no classification model uses them.
"""

from __future__ import annotations

import sys
import types

try:
    from torchvision import models
except RuntimeError:  # "operator torchvision::nms does not exist"
    for name in [name for name in sys.modules if name.split(".")[0] == "torchvision"]:
        del sys.modules[name]
    # The module that registers shapes for the missing operators.
    missing = "torchvision._meta_registrations"
    sys.modules[missing] = types.ModuleType(missing)
    from torchvision import models

__all__ = ["models"]
