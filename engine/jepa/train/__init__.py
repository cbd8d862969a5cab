"""A step, and all that is around it: DeepSpeed, the optimizer, the teacher, logs, replay, what a run needs."""
