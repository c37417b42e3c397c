"""A fleet in a Kubernetes cluster: we translate, apply and report; placing, scaling and healing are the cluster's.

names, times  labels and names, by which we know what is ours; times as the API writes them
notes         what of a spec does not map, in words
pod           spec -> pod template
scaling       spec -> HPA, disruption budget, warm pool
manifests     spec -> every object, as plain dicts; pure, so `export` prints what `up` applies
yaml          plain dicts -> YAML, for people
rbac          the permissions that all of this needs
kubeconfig    where the cluster is and who we are; needs PyYAML, from the extra `kubernetes`
identity      tokens, certificates, login plugins
api           the one module that talks to the API server
views         objects of the cluster -> the JSON of `status` and `ps`
happenings    events of the cluster -> the JSON of `events` and `history`
diff, changes what a change is told as
watching      being woken by what happens in the cluster
logs          what agents write, read and followed
engine        KubernetesEngine: all of it as one Engine
"""
