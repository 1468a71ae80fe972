"""Search strategies: ways to choose one candidate pair per layer under a budget."""
