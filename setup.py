from setuptools import find_packages, setup

setup(name="nemo-disco", version="0.1.0", packages=find_packages(include=["nemo_disco*"]))
