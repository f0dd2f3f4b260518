"""Steps that bring an older store's tables up to date, run by alembic when the store is opened."""
