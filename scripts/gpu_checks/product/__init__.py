"""The whole product on a GPU: ``castor serve`` in processes of its own, its load, and what goes wrong there."""
