"""Who runs next, and where: the scheduler as a pure state machine, its policies, and traces played through it."""
