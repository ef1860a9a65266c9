"""Graph to callable: segments compiled by Inductor between the nodes that the runtime executes."""
