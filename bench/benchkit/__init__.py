"""What the benchmark scripts share; `bench/peers` holds what runs in each contender's process."""
