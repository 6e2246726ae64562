"""A dense checkpoint made into a mixture of experts: Drop-Upcycling, copying, and how they are run as a job."""
