"""What a job needs of each device, and the layout that suits it best, from sizes alone. See docs/planner.md."""
