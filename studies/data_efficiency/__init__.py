"""Is a Vision Permutator data efficient? Six architectures on all, 30 % and 10 % of CIFAR-10, and ablations of one.

All models have the same number of parameters, within 3 %, tokens of 4x4 pixels and the recipe, and train for the same
number of multiply-accumulates, whatever the share of the data: of less data each image is seen more often. Ablations
are equal in images seen, not in size. Each seed draws weights, order and the share of the data anew. Finished trainings
are kept, so the study can be interrupted.

The small size sees ten percent of the data 15 times and all of it 1.5 times: it compares how fast models learn, and no
model of it is short of data. The full size sees them 300 and 30 times.

    python -m studies.data_efficiency /path/to/cifar10 --size small --jobs 2     # two hours on two CPU cores
    python -m studies.data_efficiency /path/to/cifar10 --size full --jobs 8      # for a GPU
"""
