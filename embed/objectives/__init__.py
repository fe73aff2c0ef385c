"""Training losses: pure functions of arrays, without configuration, logging or state."""
