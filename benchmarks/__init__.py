"""Programs that `castor bench` runs in processes of their own, and the results of its runs."""
