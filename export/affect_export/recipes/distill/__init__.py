"""Any teacher teaches any student: what `affect-distill` runs, for scripts."""

from affect_export.recipes.distill.run import Student, new_student, open_teacher, run
from affect_export.recipes.distill.settings import STAGES, Settings

__all__ = ["STAGES", "Settings", "Student", "new_student", "open_teacher", "run"]
