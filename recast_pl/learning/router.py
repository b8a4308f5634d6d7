"""A router: finds the task of an image from its features by the frozen network, without any training.

    P = ((1 − ρ)·S/f + ρ·(tr S/(f·D))·I)⁻¹ with f = images − classes, the scatters S of all tasks being added up
    s_c(x) = xᵀPμ_c − ½·μ_cᵀPμ_c for every class c of every task (linear discriminant analysis, equal priors)
    p(task | x) = the sum of softmax(s(x)/T) over the classes of the task

ρ has a closed form that needs S alone ("oracle approximating shrinkage": Chen, Wiesel, Eldar and Hero, "Shrinkage
Algorithms for MMSE Covariance Estimation", IEEE Transactions on Signal Processing 2010, equation 23, without the terms
2/D, as in scikit-learn). T is the temperature with which the tasks of validation images are most probable.
"""
