"""What processes of a run say to each other: values that run nothing, and a store that no other user reaches."""
