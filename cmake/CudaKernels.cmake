# The CUDA kernels in a wheel: their sources, which NVRTC compiles on a device, and, where there is nvcc, machine code for
# a few GPUs, which spares the device that. Nothing here fails a build: without nvcc, or with one that cannot (too old, or
# without a host compiler that it knows), the sources alone are installed. -DAFFECT_NVCC=OFF does without.
set(cuda_destination affect_runtimes/fused/cuda)
install(DIRECTORY "${cuda_dir}/" DESTINATION ${cuda_destination} FILES_MATCHING PATTERN "*.cu" PATTERN "*.h"
  PATTERN "host" EXCLUDE)

find_program(AFFECT_NVCC nvcc PATHS /usr/local/cuda/bin DOC "CUDA's compiler")
if(NOT AFFECT_NVCC)
  message(STATUS "No nvcc: NVRTC will compile the CUDA kernels on the device")
  return()
endif()

set(nvcc_flags -std=c++17 --fmad=false)
if(AFFECT_WERROR)
  list(APPEND nvcc_flags -Werror all-warnings)
endif()
foreach(sm 87 89 90)
  list(APPEND nvcc_flags -gencode arch=compute_${sm},code=sm_${sm})
endforeach()
# The real flags on next to nothing.
set(trial "${CMAKE_CURRENT_BINARY_DIR}/trial.cu")
file(WRITE "${trial}" "extern \"C\" __global__ void trial(const __grid_constant__ int x, int *y) { *y = x; }\n")
execute_process(COMMAND "${AFFECT_NVCC}" -fatbin ${nvcc_flags} -o "${trial}.fatbin" "${trial}"
  RESULT_VARIABLE trial_result OUTPUT_VARIABLE trial_output ERROR_VARIABLE trial_output)
execute_process(COMMAND "${AFFECT_NVCC}" --version RESULT_VARIABLE version_result OUTPUT_VARIABLE version_output)
if(NOT trial_result STREQUAL "0" OR NOT version_result STREQUAL "0" OR
    NOT version_output MATCHES "release ([0-9]+\\.[0-9]+)")
  message(STATUS "${AFFECT_NVCC} cannot compile the CUDA kernels, NVRTC will, on the device: ${trial_output}")
  return()
endif()
set(toolkit "${CMAKE_CURRENT_BINARY_DIR}/toolkit.txt")
file(WRITE "${toolkit}" "${CMAKE_MATCH_1}\n")

file(GLOB headers CONFIGURE_DEPENDS "${cuda_dir}/*.h")
set(fatbins)
foreach(name step scan)
  set(fatbin "${CMAKE_CURRENT_BINARY_DIR}/${name}.fatbin")
  add_custom_command(OUTPUT "${fatbin}" COMMAND "${AFFECT_NVCC}" -fatbin ${nvcc_flags} -o "${fatbin}"
    "${cuda_dir}/${name}.cu" DEPENDS "${cuda_dir}/${name}.cu" ${headers} COMMENT "Compiling ${name}.cu for GPUs" VERBATIM)
  list(APPEND fatbins "${fatbin}")
endforeach()
add_custom_target(affect_fatbins ALL DEPENDS ${fatbins})
install(FILES ${fatbins} "${toolkit}" DESTINATION ${cuda_destination})
