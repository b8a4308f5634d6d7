"""How the weights of a pretrained network become shared templates and a few coefficients. Knows nothing of tasks.

`targets` finds the weights to decompose and divides them into groups of layers. Each group g has a template bank, and
each of its layers l has K sets of n coefficients (`bank`). They stand for the weights

    W_lk = Σ_i C_lki · T_gi   (equation 1),     W_l = mean_k W_lk   (equation 2).

`solve` computes templates and coefficients in closed form. `mimicry` fits them by gradient to the pretrained weights Ŵ:
min_{C,T} E_ε Σ_l L(W_l(C + ε), Ŵ_l) with Gaussian noise ε (equation 3). Templates and coefficients are parameters
(`sources`), or come from an `autoencoder` or an `encoder` of the weights. `parametrization` installs a decomposition:
from then on, the network generates its weights from coefficients at every use. `similarity` compares the network with
the dense one, `analysis` describes the templates.
"""
