"""From runs on disk to tables, plots and one page. Nothing in here imports torch."""
