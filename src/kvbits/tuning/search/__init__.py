"""Parts of search strategies: ways to choose one candidate per layer under a budget."""
