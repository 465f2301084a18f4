"""Student, teacher and loss in one module, and what the teacher is called with."""

from .distiller import Distiller

__all__ = ["Distiller"]
