"""What a CPU process needs besides its arrays: MindSpore's compiled graphs and Python. See docs/planner.md."""

from mindrlhf.planner.job import Job

# Megabytes of MindSpore 2.9, by models so narrow that their arrays count for nothing (32 wide, 1 to 24 layers): the
# first graph with a gradient, whose compilation leaves memory that grows with the square of the layers; each further
# one, which finds most of that; and the process with its other graphs.
TRAINING_GRAPH = (70.0, 6.5, 0.87)  # constant, a layer, a squared layer
FURTHER_TRAINING_GRAPH = (6.5, 7.0)
OTHER_GRAPHS = (45.0, 3.2)


def executor_bytes(job: Job) -> float:
    """Above the process in which MindSpore has been started and no model made."""
    layers = job.policy.num_layers
    constant, linear, square = TRAINING_GRAPH
    megabytes = constant + linear * layers + square * layers**2
    megabytes += OTHER_GRAPHS[0] + OTHER_GRAPHS[1] * layers
    if job.critic:
        megabytes += FURTHER_TRAINING_GRAPH[0] + FURTHER_TRAINING_GRAPH[1] * job.critic.num_layers
    return 1e6 * megabytes
