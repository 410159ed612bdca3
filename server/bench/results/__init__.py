"""What was measured: summaries, findings, reports and plots."""
