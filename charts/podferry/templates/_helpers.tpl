{{- define "podferry.image" -}}
{{- $image := .Values.image -}}
{{- if $image.digest -}}
{{- printf "%s@%s" $image.repository $image.digest | toJson -}}
{{- else -}}
{{- printf "%s:%s" $image.repository (default .Chart.AppVersion $image.tag) | toJson -}}
{{- end -}}
{{- end -}}

{{- define "podferry.controllerCommand" -}}
{{- $words := list "podferry-controller" "--metrics-port=9464" -}}
{{- $flags := dict "cluster" "--parallel" "namespace" "--parallel-per-namespace" "outOfNode" "--parallel-out" "intoNode" "--parallel-in" -}}
{{- range $name, $flag := $flags -}}
{{- $limit := index $.Values.limits $name -}}
{{- if not (kindIs "invalid" $limit) -}}
{{- $words = append $words (printf "%s=%d" $flag (int $limit)) -}}
{{- end -}}
{{- end -}}
{{- range .Values.nodeTrouble -}}
{{- $words = append $words (printf "--node-trouble=%s" .) -}}
{{- end -}}
{{- concat $words .Values.controller.extraArgs | toJson -}}
{{- end -}}

{{- /* Not empty where the objects of the Prometheus operator are wanted. */ -}}
{{- define "podferry.monitoring" -}}
{{- $wanted := .Values.monitoring.enabled | toString -}}
{{- if or (eq $wanted "true") (and (eq $wanted "auto") (.Capabilities.APIVersions.Has "monitoring.coreos.com/v1/PodMonitor")) -}}
true
{{- end -}}
{{- end -}}
