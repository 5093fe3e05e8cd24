# Found by upstream's find_package(BLAS) in the place of CMake's own, which knows no library with prefixed names.
find_library(PW_OPENBLAS scipy_openblas PATHS ${OPENBLAS}/lib NO_DEFAULT_PATH REQUIRED)
set(BLAS_LIBRARIES ${PW_OPENBLAS})
set(BLAS_FOUND TRUE)
