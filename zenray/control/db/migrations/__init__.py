"""Alembic migrations of the control database; they run when control starts."""
