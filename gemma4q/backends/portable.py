"""Computes where nothing could be compiled ahead: numpy, with Numba for what takes the time.

Quantised matrices are repacked at load into values of 4 or 8 bits with float32 scales, other matrices into float32;
activations stay float32, and keys and values are float32 that hold what a cache of the asked type would give back.
Threads are the session's own, so that two sessions do not meet. Numba is imported when a question needs it.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING

from ..abi import TensorType
from ..errors import Gemma4qError
from ..plan.batch import Limits
from ..plan.plan import Plan
from . import TensorData

if TYPE_CHECKING:
    from .portable_session import PortableSession


class Portable:
    name = "portable"

    def available(self) -> str | None:
        try:
            import numba  # noqa: F401
        except Exception as error:  # also when it is there, but not for this Python or this numpy
            return f"Numba cannot be imported ({error})"
        return None

    def memory(
        self, plan: Plan, tensors: Mapping[str, TensorData], limits: Limits, kv: TensorType, threads: int,
        isa: str | None = None,
    ) -> dict[str, int]:  # fmt: skip
        """Bytes by purpose. Keys and values take four bytes each whatever `kv` is."""
        from .portable_session import memory

        return memory(plan, tensors, limits)

    def load(
        self, plan: Plan, tensors: Mapping[str, TensorData], limits: Limits, kv: TensorType = TensorType.F32,
        threads: int = 1, isa: str | None = None,
    ) -> "PortableSession":  # fmt: skip
        """Repacks all matrices. Raises `bad_option` for an isa: Numba compiles for the CPU it finds."""
        if isa is not None:
            raise Gemma4qError("bad_option", f"backend portable has no isa {isa}: it compiles for the CPU it finds")
        from .portable_session import PortableSession

        return PortableSession(plan, tensors, limits, kv, threads)


BACKEND = Portable()
