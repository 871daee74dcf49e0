"""The math grader: finds plainly equal answers by text and exact numbers, the rest by algebra in killable processes."""
